"""Communication between ranks: agreements, rows of counts, bytes. Knows no experts."""
