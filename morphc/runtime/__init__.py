"""What a compiled model carries: seed sites, their state, their slots, and the forward of each mode."""
