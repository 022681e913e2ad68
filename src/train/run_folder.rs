//! The folder of a run: config.toml, lock and checkpoints. Of several ranks the first alone writes to it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::{Trainer, Watch};
use crate::checkpoint::{self, Origin};
use crate::config::Config;
use crate::data::Skipped;
use crate::error::{Error, Result};
use crate::output;
use crate::text::shell_word;
use crate::usage;

/// A run folder, locked until this is dropped: two processes training in it would delete each other's files.
pub(super) struct RunFolder {
    pub path: PathBuf,
    /// The settings in its config.toml.
    pub config: Config,
    /// This rank writes to it.
    pub writes: bool,
    _lock: Option<File>,
}

impl RunFolder {
    /// Creates a folder with its config.toml: `out`, which must not hold a run, or the first free one of runs/NAME,
    /// runs/NAME-2, ... with [`Config::run_name`].
    pub fn create(out: Option<&Path>, config: &Config, watch: &mut dyn Watch) -> Result<Self> {
        let failed = |path: &Path, e| Error::file(path, format!("cannot be created: {e}"));
        let path = match out {
            Some(out) => {
                fs::create_dir_all(out).map_err(|e| failed(out, e))?;
                out.to_path_buf()
            }
            None => first_free(&config.run_name()).map_err(|e| failed(Path::new("runs"), e))?,
        };
        let lock = lock(&path)?;
        if path.join("config.toml").exists() {
            let what = format!(
                "already holds a run: continue it with --resume {}, or choose another --out",
                shell_word(&path)
            );
            return Err(Error::file(&path, what));
        }
        let subs: &[&str] = if config.model.classifier { &["checkpoints"] } else { &["samples", "checkpoints"] };
        for sub in subs.iter().map(|sub| path.join(sub)) {
            fs::create_dir_all(&sub).map_err(|e| failed(&sub, e))?;
        }
        output::write_atomically(&path.join("config.toml"), config.to_toml().as_bytes())?;
        watch.say(&format!("run folder: {}", path.display()));
        Ok(RunFolder { path, config: config.clone(), writes: true, _lock: lock })
    }

    /// The folder that the first of several ranks has created.
    pub fn of_first(path: &str, config: &Config) -> Self {
        RunFolder { path: path.into(), config: config.clone(), writes: false, _lock: None }
    }

    /// Opens the folder of a run to be continued.
    pub fn open(path: &Path, writes: bool) -> Result<Self> {
        let config = read_settings(path)?;
        let lock = if writes { lock(path)? } else { None };
        Ok(RunFolder { path: path.to_path_buf(), config, writes, _lock: lock })
    }

    /// Lists the images that are left out in skipped_images.txt, a line each.
    pub fn list_skipped(&self, skipped: &[Skipped], watch: &mut dyn Watch) -> Result<()> {
        if skipped.is_empty() || !self.writes {
            return Ok(());
        }
        let path = self.path.join("skipped_images.txt");
        let list: String = skipped.iter().map(|image| format!("{image}\n")).collect();
        output::write_atomically(&path, list.as_bytes())?;
        watch.say(&format!("images that are left out: {}", path.display()));
        Ok(())
    }

    /// What the newest checkpoint was made from, and that checkpoint. Says so if it does not know.
    pub fn origin(&self, watch: &mut dyn Watch) -> Result<Option<(PathBuf, Origin)>> {
        let Some(newest) = checkpoint::newest(&self.path)? else { return Ok(None) };
        let origin = Origin::read(&newest)?;
        if origin.is_none() {
            watch.warn(&format!(
                "{} has no run.json, so whether settings and data are still those of the run is not known",
                newest.display()
            ));
        }
        Ok(origin.map(|origin| (newest, origin)))
    }

    /// Restores `trainer` from the newest checkpoint and updates config.toml to the trainer's settings, of which only
    /// those that may change can differ.
    pub fn restore(&self, trainer: &mut Trainer, watch: &mut dyn Watch) -> Result<()> {
        let damaged = checkpoint::damaged(&self.path)?;
        match (checkpoint::newest(&self.path)?, damaged.last()) {
            (Some(newest), _) => checkpoint::restore(&newest, trainer.state_mut())?,
            (None, Some(damaged)) => {
                let what = "is damaged, and there is no other checkpoint; delete it to begin again from step 0";
                return Err(Error::file(damaged, what));
            }
            (None, None) => {}
        }
        for damaged in damaged {
            watch.warn(&format!("{} is damaged and left out", damaged.display()));
        }
        let (steps, done) = (trainer.config().steps, trainer.steps_done());
        if steps < done {
            usage!("steps = {steps}: {} has done {done} already; give more with --steps", self.path.display());
        }
        if self.writes {
            if *trainer.config() != self.config {
                output::write_atomically(&self.path.join("config.toml"), trainer.config().to_toml().as_bytes())?;
            }
            for folder in [self.path.clone(), self.path.join("samples")].iter().filter(|folder| folder.is_dir()) {
                // What cannot be deleted harms nothing.
                if let Err(e) = output::remove_unfinished(folder) {
                    watch.warn(&e.to_string());
                }
            }
        }
        let path = self.path.display();
        watch.say(&match steps == done {
            true => format!("{path} has done its {done} steps; to extend it give more with --steps"),
            false => format!("{path} continues after step {done}"),
        });
        Ok(())
    }

    /// Saves a checkpoint of a trainer whose weights are finite; returns its folder. If the run folder was moved away
    /// in the meantime, its place gets another one, from which the run can be resumed.
    pub fn save(&self, trainer: &Trainer) -> Result<PathBuf> {
        trainer.check_weights()?;
        let settings = self.path.join("config.toml");
        if self.writes && !settings.exists() {
            fs::create_dir_all(&self.path)
                .map_err(|e| Error::file(&self.path, format!("cannot be created again: {e}")))?;
            output::write_atomically(&settings, trainer.config().to_toml().as_bytes())?;
        }
        trainer.save(&self.path)
    }

    /// Adds the path of the last good checkpoint to an error.
    pub fn with_last_checkpoint(&self, error: Error) -> Error {
        if matches!(error, Error::Interrupted) {
            return error;
        }
        let last = match checkpoint::newest(&self.path) {
            Ok(Some(path)) => format!("the last good checkpoint is {}", path.display()),
            _ => "there is no checkpoint yet".into(),
        };
        Error::Failed(format!("{error}; {last}"))
    }
}

/// The settings of a run folder.
pub(super) fn read_settings(run: &Path) -> Result<Config> {
    let settings = run.join("config.toml");
    if !settings.is_file() {
        return Err(Error::file(
            run,
            "is not a run folder: it holds no config.toml; --init starts from a model's weights",
        ));
    }
    Config::read(&settings)
}

/// Creates the first of runs/NAME, runs/NAME-2, ... that does not exist.
fn first_free(name: &str) -> std::io::Result<PathBuf> {
    fs::create_dir_all("runs")?;
    for k in 1u32.. {
        let path = Path::new("runs").join(if k == 1 { name.into() } else { format!("{name}-{k}") });
        match fs::create_dir(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| path),
        }
    }
    unreachable!("four billion runs")
}

/// Locks a run folder. The lock ends when the file is closed, however the process ends. `None` on systems that cannot
/// lock folders.
fn lock(run: &Path) -> Result<Option<File>> {
    let Ok(folder) = File::open(run) else { return Ok(None) };
    let mut locked = folder.try_lock();
    if let Err(fs::TryLockError::WouldBlock) = locked {
        // Whoever looks whether a process trains here (`history`) has the folder for a moment.
        thread::sleep(Duration::from_millis(100));
        locked = folder.try_lock();
    }
    match locked {
        Ok(()) => Ok(Some(folder)),
        Err(fs::TryLockError::WouldBlock) => Err(Error::file(
            run,
            "is in use: another process trains in it; wait for it to end, or choose another --out",
        )),
        Err(fs::TryLockError::Error(_)) => Ok(None),
    }
}
