//! A device without a driver: parse, load, launch, compare.

use cuda_emu::exec::{Counters, Fault, Launch, LoadedModule, Settings, launch};
use cuda_emu::memory::Memory;
use cuda_emu::ptx;
use std::sync::Arc;

/// A device with one module.
pub struct Device {
    pub memory: Memory,
    pub module: LoadedModule,
    pub settings: Settings,
    pub cooperative: bool,
}

/// A launch's arguments, laid out as the kernel's parameters say.
#[derive(Clone, Copy)]
pub enum Arg {
    U32(u32),
    U64(u64),
}

impl Device {
    pub fn new(text: &str) -> Device {
        let module = ptx::parse(text).unwrap_or_else(|error| panic!("{error}"));
        let memory = Memory::new(256 << 20);
        let module = LoadedModule::load(&memory, Arc::new(module)).expect("the module's variables fit");
        let settings = Settings { threads: 2, ..Settings::default() };
        Device { memory, module, settings, cooperative: false }
    }

    pub fn upload<T: Copy>(&self, values: &[T]) -> u64 {
        // SAFETY: the bytes of a slice of plain numbers, for as long as the slice.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), std::mem::size_of_val(values)) };
        let at = self.memory.alloc(bytes.len() as u64).expect("memory");
        self.memory.copy_in(at, bytes).expect("an allocation of that size");
        at
    }

    pub fn download<T: Copy + Default>(&self, at: u64, count: usize) -> Vec<T> {
        let mut values = vec![T::default(); count];
        let size = std::mem::size_of_val(values.as_slice());
        // SAFETY: the bytes of the vector, which any bytes are numbers of, while nothing else uses it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size) };
        self.memory.copy_out(at, bytes).expect("an allocation of that size");
        values
    }

    pub fn run(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        args: &[Arg],
    ) -> Result<Counters, Fault> {
        let kernel = self.module.module.kernels.iter().find(|kernel| kernel.name == name);
        let kernel = kernel.unwrap_or_else(|| panic!("no kernel {name}"));
        assert_eq!(kernel.params.len(), args.len(), "arguments of {name}");
        let mut params = vec![0; kernel.param_bytes as usize];
        for (param, arg) in kernel.params.iter().zip(args) {
            let bytes = match *arg {
                Arg::U32(value) => value.to_le_bytes().to_vec(),
                Arg::U64(value) => value.to_le_bytes().to_vec(),
            };
            assert_eq!(bytes.len(), param.bytes as usize, "size of {}", param.name);
            params[param.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        self.launch_raw(name, grid, block, dynamic_shared, &params)
    }

    /// A launch with the parameters as bytes.
    pub fn launch_raw(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        params: &[u8],
    ) -> Result<Counters, Fault> {
        let kernel = self.module.module.kernels.iter().find(|kernel| kernel.name == name).expect("the kernel's name");
        let launched = Launch {
            kernel,
            module: &self.module,
            grid,
            block,
            dynamic_shared,
            params,
            multiprocessors: 108,
            cooperative: self.cooperative,
        };
        launch(&self.memory, &launched, &self.settings)
    }
}
