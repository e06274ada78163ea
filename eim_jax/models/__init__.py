"""The models: towers, the connector between them, adapters, and their composition (vlm.py)."""
