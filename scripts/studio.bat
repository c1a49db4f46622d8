@echo off
rem Opens the studio by a double click on Windows; the environment is made beside this repository the first time.
cd /d "%~dp0.."
if not exist .venv\Scripts\python.exe py -3 -m venv .venv || goto end
.venv\Scripts\python -c "import starlette, uvicorn, sd3pipe" 2>nul || .venv\Scripts\python -m pip install -c constraints.txt -e ".[studio]" || goto end
.venv\Scripts\python -P -m sd3pipe studio %*
:end
if errorlevel 1 pause
