"""Many plans at once: shapes of a mesh, machines of a sweep, on all cores."""
