"""Where the copies of each expert live: the table, and who fills it."""
