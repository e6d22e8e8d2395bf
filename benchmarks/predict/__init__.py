"""Predictions of a card's speed, without one: launches recorded, machine code counted, times predicted."""
