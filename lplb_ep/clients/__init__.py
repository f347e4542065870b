"""Clients: the MoE layers of a framework, balanced by one call. Frameworks are imported by it."""
