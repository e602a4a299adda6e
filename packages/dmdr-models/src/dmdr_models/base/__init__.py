"""What every other module may use: errors, secrets, files that are whole or not there."""
