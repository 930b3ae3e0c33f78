"""Chapter 02, Mamba-2: its exercises, checks, quiz and figures."""
