"""Parties that must agree on what an address means; they know nothing of spaces."""
