//! What tests of data sources share: a folder to put files into, and loading what is in it.

use std::fs;
use std::path::{Path, PathBuf};

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{self, Data, Dataset};

/// A config that takes the data as it is, with nothing held out.
pub fn open(source: &Path) -> Config {
    let mut config = Config::preset(Preset::Mnist);
    config.data = source.display().to_string();
    config.model.image_size = Size::DATA;
    config.model.channels = 0;
    config.held_out = 0.0;
    config
}

#[track_caller]
pub fn load(source: &Path) -> Data {
    data::load(&mut open(source)).unwrap_or_else(|e| panic!("{e}"))
}

/// The error of loading, which must be one sentence that begins with `names`, with exit code 1.
#[track_caller]
pub fn refusal(config: &mut Config, names: &Path) -> String {
    let Err(error) = data::load(config) else { panic!("{} is refused", config.data) };
    assert_eq!(error.exit_code(), 1, "{error}");
    let sentence = error.to_string();
    assert!(sentence.starts_with(&format!("{}: ", names.display())), "{sentence}");
    assert!(!sentence.contains('\n'), "{sentence}");
    sentence
}

#[track_caller]
pub fn refuses(source: &Path, want: &str) {
    let sentence = refusal(&mut open(source), source);
    assert!(sentence.contains(want), "{sentence}\nshould say: {want}");
}

pub fn all(set: &Dataset) -> Vec<u8> {
    (0..set.len()).flat_map(|i| set.image(i).to_vec()).collect()
}

/// A folder for the length of a test.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn put(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}
