"""How much each branch matters."""
