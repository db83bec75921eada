"""Other inference engines, each in its own Python environment, behind one line-JSON protocol."""
