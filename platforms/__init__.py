"""The platform contract, its op definitions, discovery, and the hulls in the box."""
