"""Plain-torch references: slow and obvious where there is a kernel, and the torch backend itself."""
