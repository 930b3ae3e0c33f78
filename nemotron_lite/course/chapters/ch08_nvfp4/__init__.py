"""Chapter 08, NVFP4: its exercises, checks, quiz and figures."""
