"""The miniature world: scenes, captions and questions that the package draws itself."""
