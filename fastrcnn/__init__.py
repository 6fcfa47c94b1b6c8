from fastrcnn import ops
