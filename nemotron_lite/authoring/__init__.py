"""Tools of the authors: execute the chapters, and check that a notebook follows the rules."""
