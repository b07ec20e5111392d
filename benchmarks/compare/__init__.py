"""Two commits of this library side by side: is the new one as fast, and are its results the same?

    python -m benchmarks.compare HEAD~1 HEAD

Each commit is exported into a folder with its own build of the extension, and runs in a worker process of its own.
Both stay alive and take turns within every round, so that a drift of the machine meets both.
"""
