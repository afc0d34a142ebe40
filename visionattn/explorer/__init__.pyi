from .explorer import Page as Page
from .explorer import explore as explore
from .explorer import refuse_foreign_file as refuse_foreign_file
from .explorer import tell as tell
