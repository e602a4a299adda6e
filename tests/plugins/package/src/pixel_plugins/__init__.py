"""One objective, one model family, one tracker and one reward, none of which dmdr knows."""
