from .explorer import Page as Page
from .explorer import explore as explore
