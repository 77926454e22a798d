"""What makes a compiled model grow while it trains: the Grower, its controllers, snapshots and rollback."""
