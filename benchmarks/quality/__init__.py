"""Quality of VSC codes beside other codes of the same networks: `python -m benchmarks.quality`."""
