"""Will it fit? Memory of a run from the shape of the model and the settings, before anything is loaded."""
