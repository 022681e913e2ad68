//! Which code of a kernel the driver is given, and its loading at the kernel's first launch.
//!
//! A GPU for which the build assembled machine code loads a stem's fatbin, out of which the driver takes one function
//! at a time. Otherwise the driver compiles PTX, all entries of a module at once; it is given one entry alone, since a
//! network needs three of attention's thirty.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;
use std::sync::Arc;

use super::driver::{CudaContext, result, sys};
use super::{Gpu, driver_error};
use crate::error::{Error, Result};
use crate::kernels::{self, Kernel};

/// Modules, by stem or by their only entry, and functions by name; kept while the GPU is open.
#[derive(Default)]
pub(super) struct Loaded {
    modules: HashMap<&'static str, Module>,
    functions: HashMap<&'static str, Function>,
    /// PTX that replaces a stem's.
    replaced: HashMap<&'static str, String>,
    /// The build has machine code that this GPU takes.
    machine_code: bool,
}

/// A module in a GPU's context.
struct Module {
    module: sys::CUmodule,
    context: Arc<CudaContext>,
}

// SAFETY: a module handle may be used from any thread.
unsafe impl Send for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: loaded once and unloaded once. Its functions are no longer used, since they are dropped with the GPU.
        self.context.record_err(unsafe { result::module::unload(self.module) });
    }
}

/// A kernel in a loaded module.
#[derive(Clone, Copy)]
pub(super) struct Function {
    pub handle: sys::CUfunction,
    /// Bytes of dynamic shared memory that it may use.
    pub shared: u32,
}

// SAFETY: as for a module.
unsafe impl Send for Function {}

impl Loaded {
    /// For a GPU whose context is current: with the kernels of the folder that `DDPM_KERNELS` names, and what the user
    /// should know about where the kernels come from. On the emulator, which runs PTX, no machine code is tried.
    ///
    /// # Errors
    /// `Error::Usage` or `Error::File` if the folder has no kernels of this build.
    pub fn new(context: &Arc<CudaContext>, capability: (u32, u32), emulated: bool) -> Result<(Loaded, Vec<String>)> {
        let (mut loaded, mut notes) = (Loaded::default(), Vec::new());
        if let Some(folder) = std::env::var_os("DDPM_KERNELS").filter(|folder| !folder.is_empty()) {
            loaded.replaced = kernels_of(Path::new(&folder))?;
            let mut stems: Vec<&str> = loaded.replaced.keys().copied().collect();
            stems.sort_unstable();
            notes.push(format!("kernels of {} replace the build's: {}", folder.display(), stems.join(", ")));
        }
        if !emulated && let Some(smallest) = kernels::MODULES.iter().min_by_key(|module| module.fatbin.len()) {
            // The driver knows best whether it takes the code: it also depends on its version and its settings.
            loaded.machine_code = load(context, smallest.fatbin).is_ok();
            if !loaded.machine_code {
                let (major, minor) = capability;
                notes.push(format!(
                    "the build has no machine code that this driver takes for compute capability {major}.{minor}: it \
                     compiles each kernel at its first launch, which takes up to a minute once"
                ));
            }
        }
        Ok((loaded, notes))
    }
}

/// PTX by stem, from the files S.ptx of a folder. Each has the entries of the build's stem S, with the same parameters.
fn kernels_of(folder: &Path) -> Result<HashMap<&'static str, String>> {
    let mut found = HashMap::new();
    for &module in kernels::MODULES {
        let path = folder.join(format!("{}.ptx", module.stem));
        let ptx = match std::fs::read_to_string(&path) {
            Ok(ptx) => ptx,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::file(&path, format!("cannot be read: {e}"))),
        };
        for kernel in kernels::ALL.iter().filter(|kernel| kernel.module.stem == module.stem) {
            let want = kernels::parameters(module.ptx(), kernel.name);
            let got = kernels::parameters(&ptx, kernel.name).ok_or_else(|| {
                Error::file(&path, format!("has no entry {}; compile the whole of {}.cu", kernel.name, module.stem))
            })?;
            if want.as_ref() != Some(&got) {
                let want = want.unwrap_or_default();
                let what =
                    format!("{} takes parameters of {got:?} bytes, but the program passes {want:?}", kernel.name);
                return Err(Error::file(&path, what));
            }
        }
        found.insert(module.stem, ptx);
    }
    if found.is_empty() {
        let what = "holds no kernels: DDPM_KERNELS names a folder of PTX files such as conv2d.ptx, made by nvcc -ptx";
        return Err(Error::file(folder, what));
    }
    Ok(found)
}

fn load(context: &Arc<CudaContext>, image: &[u8]) -> std::result::Result<Module, super::DriverError> {
    context.bind_to_thread()?;
    // Copied, because allocated memory is aligned as a fatbin needs it and bytes in the program need not be.
    let image = image.to_vec();
    // SAFETY: a fatbin as made by the build, or PTX that ends with a zero byte.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
    Ok(Module { module, context: context.clone() })
}

impl Gpu {
    /// Replaces a stem's kernels by `ptx`, for tests that plant bugs. Panics if a kernel of the stem has been launched
    /// already.
    ///
    /// # Safety
    /// The text must have the stem's entries, with their parameters, and they must stay inside their arguments. The
    /// emulator checks every access and stops a kernel that does not.
    pub unsafe fn replace_kernels(&self, stem: &'static str, ptx: String) {
        let mut loaded = self.loaded();
        let of_stem = |name: &&str| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('_'));
        assert!(!loaded.functions.keys().any(of_stem), "{stem} has been launched already");
        loaded.replaced.insert(stem, ptx);
    }

    /// The kernel's handle, for launches with up to `shared` bytes of dynamic shared memory. The first call loads it.
    pub(super) fn function(&self, kernel: &'static Kernel, shared: u32) -> Result<Function> {
        let mut loaded = self.loaded();
        let function = match loaded.functions.get(kernel.name) {
            Some(function) if shared <= function.shared => return Ok(*function),
            // A driver may wait for the GPU to load a function, or to give it more shared memory.
            Some(function) => {
                self.refuse_missing("shared memory of a kernel")?;
                function.handle
            }
            None => {
                self.refuse_missing("a kernel that is not loaded")?;
                self.load(&mut loaded, kernel)?
            }
        };
        // What a kernel declares itself counts too.
        let declared = kernel.resources.iter().map(|resources| resources.shared).max().unwrap_or(0);
        let free = super::launch::SHARED_DEFAULT.saturating_sub(declared);
        let function = Function { handle: function, shared: shared.max(free) };
        if shared > free {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.bind()?;
            // SAFETY: the function's module stays loaded while the GPU is open.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared as i32) }
                .map_err(|e| driver_error(&format!("giving {} {shared} bytes of shared memory", kernel.name), e))?;
        }
        loaded.functions.insert(kernel.name, function);
        Ok(function)
    }

    fn load(&self, loaded: &mut Loaded, kernel: &'static Kernel) -> Result<sys::CUfunction> {
        let failed = |e| driver_error(&format!("loading {} on {self}", kernel.name), e);
        let (module, context) = (kernel.module, self.inner.stream.context());
        let replaced = loaded.replaced.get(module.stem);
        let whole_stem = loaded.machine_code && replaced.is_none();
        let key = if whole_stem { module.stem } else { kernel.name };
        if !loaded.modules.contains_key(key) {
            let new = if whole_stem {
                load(context, module.fatbin)
            } else {
                let ptx = match replaced {
                    Some(ptx) => ptx,
                    None => self.ptx(module)?,
                };
                let text = CString::new(kernels::entry_alone(ptx, kernel.name))
                    .map_err(|_| Error::Failed(format!("PTX of {} with a zero", module.stem)))?;
                load(context, text.as_bytes_with_nul())
            };
            loaded.modules.insert(key, new.map_err(failed)?);
        }
        let name = CString::new(kernel.name).map_err(|_| Error::Failed(format!("{} has no symbol", kernel.name)))?;
        self.bind()?;
        // SAFETY: the module is loaded and stays loaded.
        unsafe { result::module::get_function(loaded.modules[key].module, name) }.map_err(failed)
    }

    /// A module's PTX for this GPU.
    fn ptx(&self, module: &kernels::Module) -> Result<&'static str> {
        let best = kernels::best_image(module.images, self.inner.capability);
        best.map(|image| image.ptx).ok_or_else(|| {
            let (major, minor) = self.inner.capability;
            Error::Failed(format!(
                "{self} has compute capability {major}.{minor}, for which {} is not compiled: use --device cpu",
                module.stem
            ))
        })
    }
}
