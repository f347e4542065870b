"""Clients: one call balances the MoE layers of a framework, and imports the framework."""
