"""What every other room uses: errors, secrets, whole files, and careful reading. Imports no torch."""
