"""The report of a run: one HTML file, made from what the run left in its folder."""
