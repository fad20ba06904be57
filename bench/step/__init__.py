"""Where does the time of one engine step go, and how far is it from what memory allows?"""
