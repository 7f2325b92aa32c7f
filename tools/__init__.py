"""The press: commands for authors (`python -m tools.NAME`)."""
