"""Chapter 03, attention anchors: its exercises, checks, quiz and figures."""
