RotaryEmbedding = turn_in_place = checked_tables = None
