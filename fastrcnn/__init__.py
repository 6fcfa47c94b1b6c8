from fastrcnn import models, ops
