"""Mesh and sharding rules, several processes, and signals."""
