"""Tools for all other rooms: errors, atomic files, folders, random draws, versions."""
