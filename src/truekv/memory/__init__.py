"""Where: whatever outlives a step lives here, as pages of rows and slots of state."""
