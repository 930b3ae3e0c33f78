"""Chapter 00: its exercises, checks, quiz and figures."""
