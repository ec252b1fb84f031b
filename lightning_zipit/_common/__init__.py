"""What every phase uses: copies, processes, inputs, files."""
