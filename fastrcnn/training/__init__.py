"""Training: recipes by name, one loop, a run's folder."""

from fastrcnn.training.loop import train
from fastrcnn.training.mmdet_recipe import recipe_from_config, recipe_of
from fastrcnn.training.recipe import RECIPES, Recipe, get_recipe

__all__ = ["RECIPES", "Recipe", "get_recipe", "recipe_from_config", "recipe_of", "train"]
