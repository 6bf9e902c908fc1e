"""The page that a browser gets: chat at /, the API's description at /docs. Static files and the routes to them."""
