"""What a card will do, without one: launches recorded, machine code counted, times predicted."""
