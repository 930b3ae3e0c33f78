"""Chapter 08, NVFP4: its exercises, checks, quiz, figures and lesson."""
