"""Chapter 02: its exercises, checks, quiz and figures."""
