"""What every room uses: errors, files that are whole, random draws, versions."""
