"""What walks the (token, vocabulary) plane; knows nothing of losses."""
