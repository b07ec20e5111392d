"""Ready-made ways into trainers; each file imports its library only when it is used."""
