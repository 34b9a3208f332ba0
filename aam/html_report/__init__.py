"""The report of a run: one HTML file in its folder, by `aam.html_report.write.write_report`."""

REPORT = "report.html"
"""Its name."""
