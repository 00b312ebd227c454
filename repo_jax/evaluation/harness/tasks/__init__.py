"""Task files of ours in lm-eval's format, and what makes and scores their examples."""
