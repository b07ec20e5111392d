"""The library inside trainers that people already use. Each module imports its library when it is called."""
