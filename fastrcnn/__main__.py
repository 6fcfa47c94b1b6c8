from fastrcnn.cli import main

main()
